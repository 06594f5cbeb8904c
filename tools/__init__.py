"""Commands that keep the book: its notebooks, its address, and the verdicts on the card."""
