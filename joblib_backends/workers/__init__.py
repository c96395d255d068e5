"""Worker processes of our own: started quickly, each on a socket of its own, shared by the calls of this process."""
