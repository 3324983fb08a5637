"""Starts the Space: `python app.py`, on Hugging Face or anywhere. Nothing is downloaded for the embedded worlds."""

from noise_space.app import build_app, serve

demo = build_app()

if __name__ == "__main__":
    serve(demo)
