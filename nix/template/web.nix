# The machine `web`: replace this by its configuration.nix and hardware-configuration.nix.
{
  fileSystems."/".device = "/dev/disk/by-label/nixos";
  boot.loader.grub.device = "/dev/sda";
  services.openssh.enable = true;
  system.stateVersion = "25.05";
}
