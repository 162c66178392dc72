"""Checkpoints that lie elsewhere: behind URLs, in object stores, in a hub.

An *address* says where one file is, without its secrets in anything that is shown; a *transport* fetches ranges of it;
*fetching* holds them in memory for those who read.
"""
