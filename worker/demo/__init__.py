"""The study that `mu2 demo` sends: a synthetic CT with its truth, in `study/`.

`python -m training phantoms --demo worker/demo/study` makes it again, byte for byte.
"""
