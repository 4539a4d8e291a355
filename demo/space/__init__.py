"""The page on a Hugging Face Space: the files that a Space needs (`python -m demo.space.make`), and what is different there.

Settings come from environment variables, and on ZeroGPU the model works in processes that the platform starts. The page itself is the
same as everywhere.
"""
