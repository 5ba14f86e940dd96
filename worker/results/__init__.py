"""Pure writers: a `Report` in, the bytes of one outgoing format out."""
