"""The codecs, a family a file: floats, levels, sparse, nf4, low_rank; registry names them.

scaled and rotation are what several of them share.
"""
