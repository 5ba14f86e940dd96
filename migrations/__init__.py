"""Numbered migrations of the database; `mu2 db upgrade` applies them."""
