"""Where an artifact goes: a folder on this machine (`local`), or a place in an object store (`store`).

A conversion knows neither: it opens a `base.Destination`, writes weight files, and publishes.
"""
