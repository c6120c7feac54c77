"""What a model will do on a device before anyone has run it there: `magicdec plan`."""
