"""Other libraries on the jobs of cfmask's loader and converter, a module each. ``__main__.py`` runs them."""
