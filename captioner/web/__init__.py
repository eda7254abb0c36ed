"""`caption-web`: the captioner as a web page and as an HTTP interface, with the extra `web`."""
