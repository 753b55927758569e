"""Models for other programs and from elsewhere.

Each format of an export is one file, which writes the model and proves it in the other program.

formats.py        the formats, by name
exported.py       what every export returns; text and tokens of the proof
huggingface.py    a folder for transformers
peft_adapter.py   an adapter alone, for peft
gguf.py           a folder for llama.cpp and Ollama
onnx.py           a folder for ONNX Runtime
html.py           one page that runs the model in a browser
push.py           an export on the Hugging Face Hub

imported.py       a model from elsewhere as a run
architectures.py  what can be imported, and as which options
model_folder.py   a folder of transformers
hub.py            its download
gguf_file.py      a GGUF file
"""
