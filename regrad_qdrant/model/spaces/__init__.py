"""The atom spaces, a file each: lora, core (and tied), values; registry names them."""
