"""Models for other programs: each format is one file, which writes the model and proves it in the other program.

exported.py       what every export returns; text and tokens of the proof
huggingface.py    a folder for transformers
onnx.py           a folder for ONNX Runtime
html.py           one page that runs the model in a browser
"""
