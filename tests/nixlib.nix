# A stand-in for as much of nixpkgs' lib as the modules and packages in nix/ use, so that they can
# be evaluated without network. It says no to the same things: options that do not exist, values of
# a wrong type, two values for one option.
let
  inherit (builtins)
    all
    attrNames
    concatMap
    concatStringsSep
    elem
    filter
    foldl'
    head
    isAttrs
    isBool
    isFunction
    isInt
    isList
    isString
    length
    map
    mapAttrs
    match
    removeAttrs
    replaceStrings
    stringLength
    substring
    typeOf
    ;
in
rec {
  # --- lists, sets and strings ---
  inherit (builtins) concatStringsSep replaceStrings;
  optional = condition: value: if condition then [ value ] else [ ];
  optionals = condition: values: if condition then values else [ ];
  optionalAttrs = condition: set: if condition then set else { };
  optionalString = condition: text: if condition then text else "";
  subtractLists = without: filter (value: !elem value without);
  genAttrs =
    names: function:
    builtins.listToAttrs (
      map (name: {
        inherit name;
        value = function name;
      }) names
    );
  filterAttrs =
    keep: set: removeAttrs set (filter (name: !keep name set.${name}) (attrNames set));
  mapAttrsToList = function: set: map (name: function name set.${name}) (attrNames set);
  concatMapStringsSep = separator: function: list: concatStringsSep separator (map function list);
  hasPrefix = prefix: text: substring 0 (stringLength prefix) text == prefix;
  hasSuffix =
    suffix: text: substring (stringLength text - stringLength suffix) (-1) text == suffix;
  hasInfix = infix: text: length (builtins.split (literal infix) text) > 1;
  literal = replaceStrings [ "." "[" "*" "$" ] [ "\\." "\\[" "\\*" "\\$" ];
  escapeShellArg =
    word:
    if match "[[:alnum:],._+:@%/-]+" "${word}" != null then
      "${word}"
    else
      "'${replaceStrings [ "'" ] [ "'\\''" ] "${word}"}'";
  escapeShellArgs = concatMapStringsSep " " escapeShellArg;
  literalExpression = text: { inherit text; };
  licenses.asl20 = "Apache-2.0";
  platforms.unix = [ "x86_64-linux" ];
  fileset = {
    unions = sets: concatMap (set: if isList set then set else [ set ]) sets;
    fileFilter = _: path: path;
    toSource = { root, fileset }: {
      inherit root;
      files = map toString (filter builtins.pathExists fileset);
    };
  };

  # --- properties ---
  mkIf = condition: content: {
    _type = "if";
    inherit condition content;
  };
  mkMerge = contents: {
    _type = "merge";
    inherit contents;
  };
  mkOverride = priority: content: {
    _type = "override";
    inherit priority content;
  };
  mkDefault = mkOverride 1000;
  mkForce = mkOverride 50;
  is = type: value: isAttrs value && (value._type or null) == type;

  # the values that a definition stands for, each with its priority
  discharge =
    value:
    if is "merge" value then
      concatMap discharge value.contents
    else if is "if" value then
      (if value.condition then discharge value.content else [ ])
    else if is "override" value then
      map (inner: inner // { inherit (value) priority; }) (discharge value.content)
    else
      [
        {
          priority = 100;
          inherit value;
        }
      ];

  # the sets that a definition of several options stands for: conditions move to the single options
  push =
    value:
    if is "merge" value then
      concatMap push value.contents
    else if is "if" value then
      map (mapAttrs (_: mkIf value.condition)) (push value.content)
    else if is "override" value then
      map (mapAttrs (_: mkOverride value.priority)) (push value.content)
    else
      [ value ];

  # --- options ---
  mkOption = option: option // { _type = "option"; };
  mkEnableOption =
    what:
    mkOption {
      type = types.bool;
      default = false;
      description = "Whether to enable ${what}.";
    };
  mkPackageOption =
    pkgs: name: _:
    mkOption {
      type = types.package;
      default = pkgs.${name};
      description = "The ${name} package to use.";
    };

  mergeDefinitions =
    where: type: definitions:
    let
      values = concatMap discharge definitions;
      priority =
        foldl' (low: value: if value.priority < low then value.priority else low)
          9999 values;
      strongest = map (found: found.value) (filter (found: found.priority == priority) values);
      bad = filter (value: !type.check value) strongest;
    in
    if bad != [ ] then
      throw "A definition for option `${where}' is not of type `${type.name}': ${typeOf (head bad)}"
    else
      type.merge where strongest;

  evalOption =
    where: option: definitions:
    let
      default = optional (option ? default) (mkOverride 1500 option.default);
      all = concatMap discharge (definitions ++ default);
    in
    if all == [ ] && !(option.type ? empty) then
      throw "The option `${where}' was accessed but has no value defined."
    else
      (option.apply or (value: value))
        (mergeDefinitions where option.type (definitions ++ default));

  evalTree =
    path: tree: definitions:
    if is "option" tree then
      evalOption (concatStringsSep "." path) tree definitions
    else
      let
        sets = concatMap push definitions;
        unknown = filter (name: !tree ? ${name}) (concatMap attrNames sets);
        below = name: map (set: set.${name}) (filter (set: set ? ${name}) sets);
      in
      if unknown != [ ] then
        throw "The option `${concatStringsSep "." (path ++ [ (head unknown) ])}' does not exist."
      else
        mapAttrs (name: subtree: evalTree (path ++ [ name ]) subtree (below name)) tree;

  merge =
    left: right:
    if is "option" left || !isAttrs left then
      right
    else
      left // mapAttrs (
        name: value: if left ? ${name} then merge left.${name} value else value
      ) right;

  evalModules =
    {
      modules,
      specialArgs ? { },
      prefix ? [ ],
    }:
    let
      args = specialArgs // {
        inherit config options;
      };
      load =
        module:
        let
          value = if isFunction module then module args else module;
        in
        if !isAttrs value then
          load (import value)
        else
          concatMap load (value.imports or [ ])
          ++ [
            {
              options = value.options or { };
              config =
                if value ? options || value ? config then
                  value.config or { }
                else
                  removeAttrs value [ "imports" ];
            }
          ];
      loaded = concatMap load modules;
      options = foldl' merge { } (map (module: module.options) loaded);
      config = evalTree prefix options (map (module: module.config) loaded);
    in
    {
      inherit config options;
    };

  # --- types ---
  types = rec {
    plain = name: check: {
      inherit name check;
      merge =
        where: values:
        if all (value: value == head values) values then
          head values
        else
          throw "The option `${where}' has conflicting definition values.";
    };
    bool = plain "boolean" isBool;
    str = plain "string" isString;
    int = plain "signed integer" isInt;
    path = plain "absolute path" (value: hasPrefix "/" "${toString value}");
    package = plain "package" (value: value ? outPath || hasPrefix "/nix/store/" "${value}");
    enum = values: plain "one of ${toString values}" (value: elem value values);
    strMatching =
      pattern:
      plain "string matching the pattern ${pattern}" (
        value: isString value && match pattern value != null
      );
    ints.between =
      low: high:
      plain "integer between ${toString low} and ${toString high}" (
        value: isInt value && value >= low && value <= high
      );
    ints.positive = plain "positive integer" (value: isInt value && value > 0);
    port = ints.between 0 65535;
    lines = plain "lines" isString // {
      merge = _: concatStringsSep "\n";
    };
    anything = {
      name = "anything";
      check = _: true;
      merge =
        where: values:
        if all isAttrs values && !(head values ? outPath) then
          (attrsOf anything).merge where values
        else
          (plain "anything" (_: true)).merge where values;
    };
    nullOr = type: {
      name = "null or ${type.name}";
      check = value: value == null || type.check value;
      merge =
        where: values: if all (value: value == null) values then null else type.merge where values;
    };
    either = left: right: {
      name = "${left.name} or ${right.name}";
      check = value: left.check value || right.check value;
      merge =
        where: values: (if all left.check values then left else right).merge where values;
    };
    listOf = type: {
      name = "list of ${type.name}";
      check = isList;
      empty = [ ];
      merge = where: lists: concatMap (map (value: mergeDefinitions where type [ value ])) lists;
    };
    attrsOf = type: {
      name = "attribute set of ${type.name}";
      check = isAttrs;
      empty = { };
      merge =
        where: sets:
        let
          pushed = concatMap push sets;
          given = name: map (set: set.${name}) (filter (set: set ? ${name}) pushed);
          isThere = name: concatMap discharge (given name) != [ ];
        in
        genAttrs (filter isThere (concatMap attrNames pushed)) (
          name: mergeDefinitions "${where}.${name}" type (given name)
        );
    };
    submodule = module: {
      name = "submodule";
      check = isAttrs;
      merge =
        where: definitions:
        (evalModules {
          prefix = [ where ];
          modules = [ module ] ++ map (config: { inherit config; }) definitions;
        }).config;
    };
  };
}
