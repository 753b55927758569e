"""A run as one HTML file to send to others.

collect.py    a run ──► RunReport: figures, curves, samples, surprise map
page.py       RunReport ──► the page
"""
