import lean  # noqa: F401
