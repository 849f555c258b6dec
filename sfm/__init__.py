"""Distil a vision dataset into a few synthetic images per class, from class statistics alone.

The verbs are in :mod:`sfm.api`; this module exports no name, because ``sfm.distill`` and its neighbours are
rooms (packages).
"""
