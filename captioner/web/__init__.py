"""`caption-web`: the captioner as a web page and an HTTP API; needs the extra `web`."""
