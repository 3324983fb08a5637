"""The pages of the Space; app.py beside this folder starts them."""
