"""One command a file: its function is called `command`, its place in `lm --help` is `POSITION`.

Heavy imports stay inside the functions, so that `lm --help` answers at once.
"""
