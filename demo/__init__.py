"""The Gradio page: a recording becomes text, and the page says which language it heard and which adapter spoke.

Nothing imports this package; `whisper-moe-demo` (demo.app:main) starts it.
"""
