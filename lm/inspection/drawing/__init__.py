"""Views as matplotlib figures (PNG, SVG) and as HTML pages without external files."""
