"""A model over HTTP, as OpenAI's API: `smolmlx serve`."""
