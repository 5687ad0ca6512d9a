"""SUV, WF-VAE and what they need, on public names of skiparse."""

if __name__ == "models":
    raise ImportError("import skiparse.models; this folder is installed under that name")
