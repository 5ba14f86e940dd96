"""`mu2 demo`: one study through the real services on embedded parts, watched from outside."""
