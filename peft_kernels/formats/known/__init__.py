"""Formats of quantised weights, a family a file: `FORMATS` of each module is found by being here."""
