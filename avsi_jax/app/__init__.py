"""The command avsi-app: a local web page that restores uploaded clips."""
