"""Checks on the built book, which `make book` leaves in _build/html."""
