"""A frozen language model, queries that it reads a context with, and a diffusion transformer that draws what they say:
what BLIP3-o and OpenUni have in common.

``language`` a stock language model over batches of contexts; ``chat`` a conversation as text and images in order;
``reading`` what is written and scored with them; ``generator`` what is trained, and its timesteps; ``sampler`` the
guided loop; ``model`` the adapter, but for what an architecture says of itself.
"""
