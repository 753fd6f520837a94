"""What is stored and where: layouts, codecs, placement, directory, pool."""
