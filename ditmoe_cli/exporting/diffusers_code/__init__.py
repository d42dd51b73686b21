"""The code that exported folders bring along, copied as it is: it needs torch and diffusers, and nothing of ours."""
