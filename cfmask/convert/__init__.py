"""Makes shards from sources of images, indexes shards of other programs, and verifies both.

Functions raise UserError for any problem with a source, a shard or an option: with the file, the value and the remedy.
Docstrings list other exceptions only.
"""
