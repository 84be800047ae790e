"""Where the confusion channels are: what the owner keeps."""
