"""Stands in for transformers in processes that tests start (conftest.py): open_clip imports it wherever it is there,
which takes each of some hundred ranks two seconds, and only tools/segment.py has a use for it."""

raise ImportError("transformers is hidden from the processes of these tests")
