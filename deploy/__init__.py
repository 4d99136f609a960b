"""What a real deployment needs beside the code: certificates, start scripts, units, and the whole of it on loopback."""
