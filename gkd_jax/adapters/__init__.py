"""Bridges to other training frameworks; each module needs the one it names."""
