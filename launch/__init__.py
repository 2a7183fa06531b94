"""Entry programs. Nothing imports this package."""
