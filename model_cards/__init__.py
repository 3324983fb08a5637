"""Card templates and the ready-to-push Hub folders of the embedded worlds."""
