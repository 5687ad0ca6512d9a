"""The benchmark: cases, runner, recorded results."""

if __name__ == "bench":
    raise ImportError("import skiparse.bench; this folder is installed under that name")
