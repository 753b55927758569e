"""Models for other programs: each format is one file, which writes the model and proves it in the other program.

formats.py        the formats, by name
exported.py       what every export returns; text and tokens of the proof
huggingface.py    a folder for transformers
gguf.py           a folder for llama.cpp and Ollama
onnx.py           a folder for ONNX Runtime
html.py           one page that runs the model in a browser
push.py           an export on the Hugging Face Hub
imported.py       models from elsewhere as runs: architectures.py, gguf_file.py, model_folder.py, hub.py
"""
