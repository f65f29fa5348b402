"""Other libraries on the jobs that cfmask's loader and converter do (``__main__.py``)."""
