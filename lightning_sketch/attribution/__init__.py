"""Sketched gradients: made, stored, and asked which examples taught what."""
