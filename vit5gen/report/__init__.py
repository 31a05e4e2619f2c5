"""Runs, cards and studies as one self-contained page to look at: ``report.html``."""
