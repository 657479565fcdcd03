"""Results as a web page with plots."""
