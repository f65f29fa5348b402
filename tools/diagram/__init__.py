"""The diagram of docs/architecture.md: which package imports which, read from the code and drawn as SVG."""
