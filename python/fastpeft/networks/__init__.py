"""Networks that an adapter brings along, of transformers' or diffusers' classes: imported when one is used."""
