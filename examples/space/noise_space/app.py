"""The app: both pages, their look, and how it is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from noise_space.labels_page import build_labels_page
from noise_space.pictures_page import build_pictures_page

# Fonts of the reader's machine: nothing is fetched from elsewhere.
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
STYLE = Path(__file__).with_name("style.css")
# Pictures that were shown are deleted after an hour.
_KEPT_SECONDS = 3600


def build_app() -> gr.Blocks:
    """Return the app, not served yet."""
    with gr.Blocks(
        title="hfnoise", analytics_enabled=False, fill_width=True, delete_cache=(_KEPT_SECONDS, _KEPT_SECONDS)
    ) as app:
        gr.Navbar(main_page_name="Pictures")
        build_pictures_page()
    with app.route("Label noise", "/labels"):
        gr.Navbar(main_page_name="Pictures")
        build_labels_page()
    return app


def serve(app: gr.Blocks, **options: Any) -> Any:
    """Serve an app with its look, and return what `launch` returns.

    Args:
        app (`gr.Blocks`): of [`build_app`].
        options: of `launch`; address and port follow the variables of Gradio, which a Space sets.
    """
    theme = gr.themes.Default(**FONTS)
    return app.launch(share=False, ssr_mode=False, theme=theme, css_paths=STYLE, footer_links=["api"], **options)
