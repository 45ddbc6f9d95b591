"""The ground floor: keys, files, waiting, meters and the protocols that the rooms above share.

Imports only torch, numpy and the standard library.
"""
