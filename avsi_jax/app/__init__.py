"""The command avsi-app: a local web page that restores gaps in uploaded clips."""
