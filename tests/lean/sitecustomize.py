import sys

if sys.version_info >= (3, 10):  # noqa: UP036 (a test tries what older ones say)
    import lean  # noqa: F401
