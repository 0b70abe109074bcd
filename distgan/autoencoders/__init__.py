"""Fixed autoencoders between images and latents: load one, encode shards with it, decode generated latents."""
