"""Snapshots on disk: one folder of data files and a manifest.

`record` gives a closed block's bytes and their hash, `format` the manifest, `folder` reads and writes
files, `verify` checks a folder against its hashes, `parallel_map` works in a few threads.
"""
